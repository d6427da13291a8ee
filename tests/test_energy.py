"""The energy meter, on counters as Linux shows them."""

import sys
import time
from types import SimpleNamespace

import pytest

from tasks import energy


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """One processor of 1,000 J around, with a part and a whole of it that must not be counted as well."""
    for name, zone in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{zone}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000\n")
        (tmp_path / name / "energy_uj").write_text("400000000\n")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path / "intel-rapl:0" / "energy_uj"


def test_energy_is_counted_over_a_wrap_around(powercap):
    whole = powercap.parents[1] / "intel-rapl:1" / "energy_uj"
    with energy.measured() as used:
        powercap.write_text("900000000")
        used.read()
        powercap.write_text("100000000")
        whole.write_text("990000000")
    assert used.joules == pytest.approx(700)


def test_a_counter_that_goes_away_costs_the_figure_and_not_the_work(powercap):
    with energy.measured() as used:
        powercap.unlink()
    assert used.joules is None


def test_readings_in_between_catch_every_wrap_around(powercap, monkeypatch):
    monkeypatch.setattr(energy, "SECONDS_BETWEEN_READINGS", 0.001)
    with energy.measured() as used:
        for level in (900, 300, 900, 300):
            before = used.joules
            whole = powercap.with_suffix(".new")
            whole.write_text(f"{level * 1_000_000}")
            whole.replace(powercap)
            while used.joules == before:
                time.sleep(0.001)
    assert used.joules == pytest.approx(500 + 400 + 600 + 400)


def test_where_nothing_tells_there_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with energy.measured() as used:
        pass
    assert used.joules is None


def test_a_counter_that_may_not_be_read_is_passed_over(powercap):
    powercap.unlink()
    with energy.measured() as used:
        pass
    assert used.joules is None


def test_gpus_are_counted_in_millijoules(tmp_path, monkeypatch):
    counters = {0: 5_000, 1: 70_000}
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setitem(
        sys.modules,
        "pynvml",
        SimpleNamespace(
            nvmlInit=lambda: None,
            nvmlDeviceGetCount=lambda: len(counters),
            nvmlDeviceGetHandleByIndex=lambda number: number,
            nvmlDeviceGetTotalEnergyConsumption=counters.__getitem__,
        ),
    )
    with energy.measured() as used:
        counters.update({0: 6_500, 1: 70_250})
    assert used.joules == pytest.approx(1.75)
