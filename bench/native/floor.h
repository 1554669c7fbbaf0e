/* The floor's frame: length (of what follows it), kind, id, payload; numbers are big-endian. */

enum { HEADER = 9 };
enum { JOIN = 'J', SAY = 'S', CAST = 'C', ACK = 'A', RECEIPT = 'R' };
