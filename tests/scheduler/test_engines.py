import msgspec
import pytest

from tabane.model import App, Class
from tabane.scheduler.engines import EngineView, explain_none, pick_engine

RUNC = EngineView("runc", Class.CONTAINER)
CRUN = EngineView("crun", Class.CONTAINER)
WASMTIME = EngineView("wasmtime", Class.UNIKERNEL, ("wasm",))
QEMU = EngineView("qemu", Class.MICROVM, emulated=True)
ALL = (CRUN, RUNC, WASMTIME, QEMU)


def app(**changes: object) -> App:
    return App(name="hello", image="sha256:" + "0" * 64, **changes)


def test_the_first_that_runs_the_class_is_picked() -> None:
    assert pick_engine(app(), ALL) == "crun"
    assert pick_engine(app(), reversed(ALL)) == "runc"


def test_the_driver_that_an_app_names_is_picked() -> None:
    assert pick_engine(app(driver="runc"), ALL) == "runc"


@pytest.mark.parametrize("isolation", [Class.SANDBOX, Class.VM])
def test_what_nothing_runs_gets_no_weaker_class(isolation: Class) -> None:
    asked = app(isolation=isolation)
    assert pick_engine(asked, ALL) == ""
    assert explain_none(asked, ALL) == f"has no working driver for class {isolation}"


def test_an_engine_gets_only_images_of_its_kinds() -> None:
    asked = app(isolation=Class.UNIKERNEL)
    assert pick_engine(asked, ALL) == ""
    assert explain_none(asked, ALL) == "wasmtime runs no linux images"
    assert pick_engine(app(isolation=Class.UNIKERNEL, image_kind="wasm"), ALL) == "wasmtime"
    assert pick_engine(msgspec.structs.replace(app(), image="host"), ALL) == "crun"


def test_emulation_is_had_only_by_those_that_allow_it() -> None:
    asked = app(isolation=Class.MICROVM)
    assert pick_engine(asked, ALL) == ""
    assert "allow_emulation" in explain_none(asked, ALL)
    assert pick_engine(app(isolation=Class.MICROVM, allow_emulation=True), ALL) == "qemu"


def test_a_driver_that_does_not_work_is_named() -> None:
    assert explain_none(app(driver="runc"), [CRUN]) == "has no working driver runc"
