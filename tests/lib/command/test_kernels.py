"""The choice of CPU kernels: what the libraries are told, and what torch makes of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.lib.command import kernels
from tests.real_files import PROJECT

FLAGS = {"AVX2 alone": "fpu avx avx2 fma", "AVX-512": "fpu avx avx2 avx512f", "before AVX2": "fpu sse4_2 avx avx2x"}
SAYS_ITS_KERNELS = "import torch; print(torch.backends.cpu.get_cpu_capability())"


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def chosen(tmp_path: Path, params: str, flags: str, before: dict[str, str]) -> dict[str, str]:
    (tmp_path / "params.yaml").write_text(params)
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : a processor\nflags     : {flags}\n")
    environment = dict(before)
    kernels.choose_kernels(tmp_path / "params.yaml", environment, tmp_path / "cpuinfo")
    return environment


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("processor", ["AVX2 alone", "AVX-512"])
def test_portable_kernels_are_those_of_avx2_and_fastest_ones_are_left_to_the_libraries(
    processor: str, tmp_path: Path
) -> None:
    told = {"MKL_CBWR": "COMPATIBLE"}
    assert chosen(tmp_path, "kernels: portable\n", FLAGS[processor], told) == kernels.AVX2_ALONE
    assert chosen(tmp_path, "kernels: fastest\n", FLAGS[processor], told | {"HOME": "x"}) == {"HOME": "x"}


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(
    ("params", "flags"),
    [("kernels: portable\n", FLAGS["before AVX2"]), ("kernels: other\n", FLAGS["AVX-512"]), ("[\n", FLAGS["AVX-512"])],
)
def test_a_processor_without_avx2_and_settings_that_make_no_sense_change_nothing(
    params: str, flags: str, tmp_path: Path
) -> None:
    assert chosen(tmp_path, params, flags, {"MKL_CBWR": "AVX"}) == {"MKL_CBWR": "AVX"}


def test_a_choice_that_comes_too_late_is_an_error(tmp_path: Path) -> None:
    import torch  # noqa: F401  (its presence is what is refused)

    with pytest.raises(RuntimeError, match="torch has been imported"):
        chosen(tmp_path, "kernels: portable\n", FLAGS["AVX-512"], {})
    chosen(tmp_path, "kernels: portable\n", FLAGS["AVX-512"], kernels.AVX2_ALONE)


@pytest.mark.skipif(not kernels.has_avx2(), reason="this processor has no AVX2, so torch has nothing to choose from")
def test_torch_obeys(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("kernels: portable\n")
    code = f"from stages.lib.command.kernels import choose_kernels; choose_kernels(); {SAYS_ITS_KERNELS}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "AVX2"
