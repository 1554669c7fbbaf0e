;; A component of wasi:http that never answers a request.
(component
  (import "wasi:http/types@0.2.0" (instance $types
    (export "incoming-request" (type (sub resource)))
    (export "response-outparam" (type (sub resource)))))
  (alias export $types "incoming-request" (type $request))
  (alias export $types "response-outparam" (type $answer))
  (core module $program
    (func (export "handle") (param i32 i32)
      loop
        br 0
      end))
  (core instance $made (instantiate $program))
  (type $handle (func (param "request" (own $request)) (param "response-out" (own $answer))))
  (func $handle (type $handle) (canon lift (core func $made "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))
