#!/bin/sh
# The processes that use the most memory, read from a k2i's unix socket with curl and awk alone:
#
#     k2i --unix /tmp/k2i.sock &
#     sh top.sh /tmp/k2i.sock 10
#
# In a container whose app asks for k2i: sh top.sh "${TABANE_K2I#unix://}"
set -eu

socket=${1:?usage: top.sh SOCKET [ROWS]}
rows=${2:-10}
fields=pid,user,rss_kib,instance,name

curl --silent --show-error --fail --max-time 10 --unix-socket "$socket" \
  "http://localhost/v2/processes?fields=$fields&sort=-rss_kib&limit=$rows" |
  awk -v fields="$fields" '
    # Rows have the fields in the order in which they were asked for. A text may hold anything, so
    # it is read as JSON has it: its escapes stay, and nothing in it can move the cursor.
    BEGIN { columns = split(fields, names, ",") }
    { text = text $0 }
    END {
      for (i = 1; i <= columns; i++) printf "%-14s", toupper(names[i])
      print ""
      sub(/^\{"processes":\[/, "", text)
      while (match(text, /^,?\{/)) {
        text = substr(text, RLENGTH + 1)
        for (i = 1; i <= columns; i++) printf "%-14s", field()
        print ""
        text = substr(text, 2)
      }
    }
    function field(  value) {
      match(text, /^,?"[a-z0-9_]+":("([^"\\]|\\.)*"|[-+.0-9eE]+|true|false|null)/)
      value = substr(text, 1, RLENGTH)
      text = substr(text, RLENGTH + 1)
      sub(/^,?"[a-z0-9_]+":/, "", value)
      gsub(/^"|"$/, "", value)
      return value == "" ? "-" : value
    }'
