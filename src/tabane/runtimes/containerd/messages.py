"""Those of containerd's messages that Tabane says and hears, and its calls, as one table.

A field is `NAME: (NUMBER, TYPE)` with protobuf's scalar types, another message of the table, or a
list `[TYPE]`; fields that are not named here are skipped when they come, as protobuf wants it. So
there is no generated code, and no compiler is needed to change it. Names and numbers are those of
containerd's api/ (services/tasks/v1, services/containers/v1, types), of runc's options, and of the
metrics that shims send (cgroups v1 and v2).
"""

from __future__ import annotations

from functools import cache
from typing import Any

Fields = dict[str, tuple[int, str | list[str]]]

_PROCESS: Fields = {"container_id": (1, "string"), "exec_id": (2, "string")}
_STREAMS = ("stdin", "stdout", "stderr")

MESSAGES: dict[str, Fields] = {
    "Empty": {},
    "Any": {"type_url": (1, "string"), "value": (2, "bytes")},
    "Timestamp": {"seconds": (1, "int64"), "nanos": (2, "int32")},
    "Mount": {
        "type": (1, "string"),
        "source": (2, "string"),
        "target": (3, "string"),
        "options": (4, ["string"]),
    },
    # containers
    "Runtime": {"name": (1, "string"), "options": (2, "Any")},
    "Container": {"id": (1, "string"), "runtime": (4, "Runtime"), "spec": (5, "Any")},
    "CreateContainerRequest": {"container": (1, "Container")},
    "CreateContainerResponse": {"container": (1, "Container")},
    "DeleteContainerRequest": {"id": (1, "string")},
    # tasks
    "CreateTaskRequest": {
        "container_id": (1, "string"),
        "rootfs": (3, ["Mount"]),
        "stdin": (4, "string"),
        "stdout": (5, "string"),
        "stderr": (6, "string"),
        "terminal": (7, "bool"),
        "options": (9, "Any"),
    },
    "CreateTaskResponse": {"container_id": (1, "string"), "pid": (2, "uint32")},
    "StartRequest": _PROCESS,
    "StartResponse": {"pid": (1, "uint32")},
    "DeleteTaskRequest": {"container_id": (1, "string")},
    "DeleteProcessRequest": _PROCESS,
    "DeleteResponse": {"id": (1, "string"), "pid": (2, "uint32"), "exit_status": (3, "uint32")},
    "GetRequest": _PROCESS,
    "GetResponse": {"process": (1, "Process")},
    "Process": {
        "container_id": (1, "string"),
        "id": (2, "string"),
        "pid": (3, "uint32"),
        "status": (4, "int32"),
        "exit_status": (9, "uint32"),
    },
    "KillRequest": {**_PROCESS, "signal": (3, "uint32"), "all": (4, "bool")},
    "ExecProcessRequest": {
        "container_id": (1, "string"),
        **{name: (number, "string") for number, name in enumerate(_STREAMS, 2)},
        "terminal": (5, "bool"),
        "spec": (6, "Any"),
        "exec_id": (7, "string"),
    },
    "ResizePtyRequest": {**_PROCESS, "width": (3, "uint32"), "height": (4, "uint32")},
    "CloseIORequest": {**_PROCESS, "stdin": (3, "bool")},
    "PauseTaskRequest": {"container_id": (1, "string")},
    "ResumeTaskRequest": {"container_id": (1, "string")},
    "ListPidsRequest": {"container_id": (1, "string")},
    "ListPidsResponse": {"processes": (1, ["ProcessInfo"])},
    "ProcessInfo": {"pid": (1, "uint32")},
    "UpdateTaskRequest": {"container_id": (1, "string"), "resources": (2, "Any")},
    "MetricsRequest": {"filters": (1, ["string"])},
    "MetricsResponse": {"metrics": (1, ["Metric"])},
    "Metric": {"id": (2, "string"), "data": (3, "Any")},
    "WaitRequest": _PROCESS,
    "WaitResponse": {"exit_status": (1, "uint32"), "exited_at": (2, "Timestamp")},
    "VersionResponse": {"version": (1, "string"), "revision": (2, "string")},
    # options of io.containerd.runc.v2
    "RuncOptions": {"io_uid": (4, "uint32"), "io_gid": (5, "uint32"), "root": (7, "string")},
    # io.containerd.cgroups.v1.Metrics
    "MetricsV1": {"pids": (2, "PidsStat"), "cpu": (3, "CpuStatV1"), "memory": (4, "MemoryStatV1")},
    "PidsStat": {"current": (1, "uint64")},
    "CpuStatV1": {"usage": (1, "CpuUsage")},
    "CpuUsage": {"total": (1, "uint64")},
    "MemoryStatV1": {"total_inactive_file": (30, "uint64"), "usage": (33, "MemoryEntry")},
    "MemoryEntry": {"usage": (2, "uint64")},
    # io.containerd.cgroups.v2.Metrics
    "MetricsV2": {"pids": (1, "PidsStat"), "cpu": (2, "CpuStatV2"), "memory": (4, "MemoryStatV2")},
    "CpuStatV2": {"usage_usec": (1, "uint64")},
    "MemoryStatV2": {"inactive_file": (15, "uint64"), "usage": (32, "uint64")},
}

TASKS = "containerd.services.tasks.v1.Tasks"
CONTAINERS = "containerd.services.containers.v1.Containers"

CALLS: dict[str, tuple[str, str, str]] = {
    "version": ("containerd.services.version.v1.Version/Version", "Empty", "VersionResponse"),
    "create_container": (
        f"{CONTAINERS}/Create",
        "CreateContainerRequest",
        "CreateContainerResponse",
    ),
    "delete_container": (f"{CONTAINERS}/Delete", "DeleteContainerRequest", "Empty"),
    "create": (f"{TASKS}/Create", "CreateTaskRequest", "CreateTaskResponse"),
    "start": (f"{TASKS}/Start", "StartRequest", "StartResponse"),
    "delete": (f"{TASKS}/Delete", "DeleteTaskRequest", "DeleteResponse"),
    "delete_process": (f"{TASKS}/DeleteProcess", "DeleteProcessRequest", "DeleteResponse"),
    "get": (f"{TASKS}/Get", "GetRequest", "GetResponse"),
    "kill": (f"{TASKS}/Kill", "KillRequest", "Empty"),
    "exec": (f"{TASKS}/Exec", "ExecProcessRequest", "Empty"),
    "resize": (f"{TASKS}/ResizePty", "ResizePtyRequest", "Empty"),
    "close_io": (f"{TASKS}/CloseIO", "CloseIORequest", "Empty"),
    "pause": (f"{TASKS}/Pause", "PauseTaskRequest", "Empty"),
    "resume": (f"{TASKS}/Resume", "ResumeTaskRequest", "Empty"),
    "list_pids": (f"{TASKS}/ListPids", "ListPidsRequest", "ListPidsResponse"),
    "update": (f"{TASKS}/Update", "UpdateTaskRequest", "Empty"),
    "metrics": (f"{TASKS}/Metrics", "MetricsRequest", "MetricsResponse"),
    "wait": (f"{TASKS}/Wait", "WaitRequest", "WaitResponse"),
}
"""Path, request and response."""

SPEC_URL = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
PROCESS_URL = "types.containerd.io/opencontainers/runtime-spec/1/Process"
RESOURCES_URL = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
"""Of JSON as OCI has it, in an `Any`."""
RUNC_OPTIONS_URL = "containerd.runc.v1.Options"
METRICS_URLS = {
    "io.containerd.cgroups.v1.Metrics": "MetricsV1",
    "io.containerd.cgroups.v2.Metrics": "MetricsV2",
}

_PACKAGE = "tabane.containerd"


@cache
def classes() -> dict[str, Any]:
    """The message classes by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(
        name="tabane/containerd.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            message.field.add(name=field, number=number, **_describe(kind))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in MESSAGES
    }


def _describe(kind: str | list[str]) -> dict[str, Any]:
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field

    (item,) = kind if isinstance(kind, list) else (kind,)
    label = Field.LABEL_REPEATED if isinstance(kind, list) else Field.LABEL_OPTIONAL
    if item in MESSAGES:
        return {"label": label, "type": Field.TYPE_MESSAGE, "type_name": f".{_PACKAGE}.{item}"}
    return {"label": label, "type": Field.Type.Value(f"TYPE_{item.upper()}")}


def make(name: str, /, **fields: Any) -> Any:
    """A message. Raises `ValueError` for a field that it has not, `TypeError` for a wrong type."""
    return classes()[name](**fields)
