"tools/setup.sh, run with make-believe interpreters: what it chooses, what it says, and what it leaves behind when it is broken off."
import os
import shutil
import subprocess

import pytest

NAMES = ["python3", "python3.13", "python3.12", "python3.11"]
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *version_info*) echo {version} ;;
    *ensurepip*) exit {no_venv} ;;
    *"-m venv"*) echo "{version} $@" >> calls; mkdir -p .venv/bin; cp pip_stand_in .venv/bin/python ;;
esac
"""
PIP_STAND_IN = '#!/bin/sh\necho "$@" >> calls\ncase "$*" in *download.pytorch.org*) exit 1 ;; *-e*) exit ${PIP_FAILS:-0} ;; esac\n'


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def house(tmp_path, root):
    "A folder with the set-up script, and a `bin` that stands before everything else on PATH."
    (tmp_path / "tools").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(root / "tools/setup.sh", tmp_path / "tools")
    shutil.copy(root / "constraints.txt", tmp_path)
    script(tmp_path / "pip_stand_in", PIP_STAND_IN)
    script(tmp_path / "bin/uname", "#!/bin/sh\necho Linux\n")
    return tmp_path


def pythons(house, **versions):
    "Put an interpreter of the given version behind each name: `python3='3.9'`; `+` after it means that it has its venv module."
    for name in NAMES:
        version = versions.get(name.replace(".", "_"), "")
        text = FAKE_PYTHON.format(version=version.rstrip("+"), no_venv=int(not version.endswith("+")))
        script(house / "bin" / name, text if version else "#!/bin/sh\nexit 127\n")


def setup(house, **env):
    env = os.environ | {"PATH": f"{house / 'bin'}:/usr/bin:/bin", "PYTHON": "", "SFTLAB_NEED_MB": "1"} | env
    return subprocess.run(["sh", "tools/setup.sh"], cwd=house, env=env, capture_output=True, text=True, timeout=60)


def calls(house):
    path = house / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10", "3.14"])
def test_a_python_outside_the_range_is_named(house, version):
    pythons(house, python3=version + "+")
    done = setup(house)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and f"python3 is {version}" in done.stderr and "3.11, 3.12 or 3.13" in done.stderr


def test_no_python_at_all(house):
    pythons(house)
    done = setup(house)
    assert done.returncode == 1 and "found: none" in done.stderr


def test_a_missing_venv_module_says_which_package_to_install(house):
    pythons(house, python3="3.11")
    done = setup(house)
    assert done.returncode == 1 and "sudo apt install python3-venv" in done.stderr
    assert not (house / ".venv").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(house):
    pythons(house, python3="3.11+")
    done = setup(house, SFTLAB_NEED_MB="999999999")
    assert done.returncode == 1 and "needs 999999999 MiB of free disk" in done.stderr
    assert not (house / ".venv").exists()


@pytest.mark.parametrize("named, taken", [("", "3.12"), ("python3.11", "3.11")])
def test_the_first_python_that_fits_is_taken_or_the_one_that_is_named(house, named, taken):
    pythons(house, python3="3.9+", python3_13="3.13", python3_12="3.12+", python3_11="3.11+")
    assert setup(house, PYTHON=named).returncode == 0
    assert calls(house)[0] == f"{taken} -m venv --clear .venv"


def test_an_installation_that_breaks_off_is_begun_again(house):
    pythons(house, python3="3.11+")
    broken = setup(house, PIP_FAILS="1")
    assert broken.returncode == 1 and "Run make again" in broken.stderr
    assert not (house / ".venv/.installed").exists()
    (house / ".venv/half").touch()
    assert setup(house).returncode == 0
    assert (house / ".venv/.installed").exists()
    assert sum("--clear" in c for c in calls(house)) == 2


def test_a_finished_installation_is_brought_up_to_date_in_place(house):
    pythons(house, python3="3.11+")
    assert setup(house).returncode == 0
    assert setup(house, PIP_FAILS="1").returncode == 1
    assert sum("--clear" in c for c in calls(house)) == 1
    assert not (house / ".venv/.installed").exists(), "a broken update must not pass for a finished one"


@pytest.mark.parametrize("system, card, tried", [("Linux", False, True), ("Linux", True, False), ("Darwin", False, False)])
def test_cpu_wheels_of_torch_are_tried_where_they_save_gigabytes(house, system, card, tried):
    pythons(house, python3="3.11+")
    script(house / "bin/uname", f"#!/bin/sh\necho {system}\n")
    if card:
        script(house / "bin/nvidia-smi", "#!/bin/sh\n")
    elif shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("this machine has an NVIDIA card")
    done = setup(house)
    assert done.returncode == 0  # even though the index is out of reach
    assert any("download.pytorch.org/whl/cpu" in c for c in calls(house)) == tried
    assert calls(house)[-1].endswith("install -c constraints.txt -e .[lab,dev]")
