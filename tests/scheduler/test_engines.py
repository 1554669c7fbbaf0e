import msgspec
import pytest

from tabane.model import App, Class, Container, Reactive, SecurityPolicy, Trust, Volume
from tabane.node.engines import FEATURES
from tabane.scheduler.engines import (
    TABLES,
    EngineView,
    explain_none,
    misfit,
    passed_over,
    pick_engine,
)

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


def test_what_an_engine_can_never_give_sends_an_app_to_another_or_is_said() -> None:
    refuses = {"CAP_SYS_ADMIN": "cannot hold it", "workdir": "has no directories"}
    strict = msgspec.structs.replace(CRUN, refuses=refuses)
    asked = app(security=SecurityPolicy(capabilities=("CAP_SYS_ADMIN",)))
    assert pick_engine(app(), (strict, RUNC)) == "crun"
    assert pick_engine(asked, (strict, RUNC)) == "runc"
    assert pick_engine(asked, (strict,)) == ""
    assert explain_none(asked, (strict,)) == "crun cannot hold it"


def test_what_an_engine_lacks_is_called_as_the_app_file_does() -> None:
    asked = app(
        isolation=Class.MICROVM,
        allow_emulation=True,
        volumes=(Volume("data", "/data"),),
        containers=(Container("cache", "host"),),
    )
    with_volumes = msgspec.structs.replace(QEMU, features=("volumes",))
    assert explain_none(asked, [with_volumes]) == "qemu runs no app with [[containers]]"
    assert explain_none(asked, [QEMU]) == "qemu runs no app with [[volumes]] and [[containers]]"
    whole = msgspec.structs.replace(QEMU, features=FEATURES)
    assert pick_engine(asked, [with_volumes, whole]) == "qemu"
    assert set(TABLES) == set(FEATURES)


def test_a_driver_that_does_not_work_is_named() -> None:
    assert explain_none(app(driver="runc"), [CRUN]) == "has no working driver runc"


def test_a_driver_that_does_not_work_runs_nothing_and_is_named_where_the_image_is_for_it() -> None:
    solo5 = EngineView("solo5-spt", Class.UNIKERNEL, ("solo5",), broken="it is not installed")
    asked = app(isolation=Class.UNIKERNEL, image_kind="solo5")
    assert pick_engine(asked, [WASMTIME, solo5]) == ""
    assert explain_none(asked, [WASMTIME, solo5]) == "solo5-spt does not work: it is not installed"


CONTAINER, SANDBOX = EngineView("runc", Class.CONTAINER), EngineView("runsc", Class.SANDBOX)
VM = EngineView("qemu", Class.VM)


def auto(trust: Trust | None, **changes: object) -> App:
    return app(isolation=Class.AUTO, trust=trust, **changes)


def test_auto_gives_who_is_trusted_the_cheapest_and_others_no_shared_kernel() -> None:
    engines = (VM, SANDBOX, CONTAINER)
    assert pick_engine(auto(Trust.TRUSTED), engines) == "runc"
    assert pick_engine(auto(Trust.ANONYMOUS), engines) == "runsc"
    assert pick_engine(auto(None), engines) == "runsc"


def test_auto_runs_nothing_for_the_unknown_where_only_containers_are() -> None:
    asked = auto(Trust.ANONYMOUS)
    assert pick_engine(asked, [CONTAINER]) == ""
    assert explain_none(asked, [CONTAINER]) == (
        "has nothing for anonymous callers "
        "(runc runs class container, which is not for anonymous callers)"
    )
    assert "no driver works there" in explain_none(asked, [])


def test_auto_takes_what_the_image_fits() -> None:
    asked = auto(Trust.TRUSTED, image_kind="wasm")
    assert pick_engine(asked, (CONTAINER, SANDBOX, WASMTIME)) == "wasmtime"


@pytest.mark.parametrize(
    ("budget_s", "picked"), [(None, "slow"), (0.3, "slow"), (0.05, "quick"), (0.001, "quick")]
)
def test_auto_keeps_to_the_wake_budget_as_far_as_that_can_be(
    budget_s: float | None, picked: str
) -> None:
    slow = EngineView("slow", Class.SANDBOX, wake_s=0.2)
    quick = EngineView("quick", Class.MICROVM, wake_s=0.02)
    asked = auto(Trust.ANONYMOUS, reactive=Reactive(wake_budget_s=budget_s))
    assert pick_engine(asked, (slow, quick)) == picked


def test_what_auto_passes_over_is_explained() -> None:
    quick = EngineView("quick", Class.SANDBOX)
    engines = (CRUN, CONTAINER, WASMTIME, SANDBOX)
    not_them = "each of crun, runc runs class container, which is not for anonymous callers"
    assert passed_over(auto(None), engines) == f"{not_them}; wasmtime runs no linux images"
    assert passed_over(auto(Trust.TRUSTED), engines) == ""
    assert passed_over(app(isolation=Class.SANDBOX), engines) == "", "it was asked for by name"
    hurried = auto(None, reactive=Reactive(wake_budget_s=0.1))
    slow = msgspec.structs.replace(quick, name="slow", wake_s=0.25)
    assert (
        passed_over(hurried, (slow, VM)) == "slow took 0.25 s to start, more than its wake budget"
    )
    assert passed_over(hurried, (slow, msgspec.structs.replace(VM, wake_s=2.0))) == (
        "slow took 0.25 s to start, more than its wake budget, and nothing is faster"
    )
    assert passed_over(hurried, ()) == ""


def test_what_has_not_started_yet_is_tried() -> None:
    known = EngineView("known", Class.MICROVM, wake_s=0.2)
    asked = auto(Trust.ANONYMOUS, reactive=Reactive(wake_budget_s=0.1))
    assert pick_engine(asked, (SANDBOX, known)) == "runsc"


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        (App("a", "sha256:1"), ""),
        (App("a", "host"), ""),
        (App("a", "host", isolation=Class.AUTO), ""),
        (App("a", "sha256:1", isolation=Class.UNIKERNEL, image_kind="wasm"), ""),
        (App("a", "sha256:1", isolation=Class.AUTO, image_kind="wasm"), ""),
        (
            App("a", "sha256:1", isolation=Class.UNIKERNEL),
            "is a linux image, and class unikernel runs solo5, wasm images: "
            "class container or microvm does",
        ),
        (
            App("a", "sha256:1", image_kind="wasm"),
            "is a wasm image, and class container runs host, linux images: class unikernel does",
        ),
        (
            App("a", "sha256:1", isolation=Class.UNIKERNEL, driver="w", image_kind="solo5"),
            "is a solo5 image, and driver w runs wasm images: class unikernel does",
        ),
        (
            App("a", "sha256:1", isolation=Class.VM),
            "is a linux image, and class vm runs no images: class container or microvm does",
        ),
        (
            App("a", "sha256:1", image_kind="odd"),
            "is a odd image, and class container runs host, linux images",
        ),
    ],
)
def test_images_that_a_class_never_runs(app: App, reason: str) -> None:
    engines = (
        EngineView("c", Class.CONTAINER),
        EngineView("w", Class.UNIKERNEL, ("wasm",)),
        EngineView("s", Class.UNIKERNEL, ("solo5",)),
        EngineView("m", Class.MICROVM, ("linux",)),
    )
    assert misfit(app, engines) == reason
