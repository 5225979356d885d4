"""tools/setup.sh, run with make-believe interpreters.

What it chooses, what it says, and what it leaves when it is broken off.
"""
import importlib.util
import os
import shutil
import subprocess

import pytest

NAMES = ["python3", "python3.13", "python3.12", "python3.11"]
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *version_info*) echo {version} ;;
    *ensurepip*) exit {no_venv} ;;
    *"-m venv"*) echo "{version} $@" >> calls
        mkdir -p .venv/bin; cp pip_stand_in .venv/bin/python ;;
esac
"""
PIP_STAND_IN = """#!/bin/sh
echo "$@" >> calls
case "$*" in
    *install*uv==*) [ -z "$UV_THERE" ] || cp uv_stand_in .venv/bin/uv ;;
    *uv_settings*) echo "export UV_FIND_LINKS=/a/folder" ;;
    *download.pytorch.org*) exit 1 ;;
    *" -e "*) exit ${PIP_FAILS:-0} ;;
esac
"""
UV_STAND_IN = """#!/bin/sh
echo "uv $@ from $UV_FIND_LINKS" >> calls
case "$*" in *download.pytorch.org*) exit 1 ;; *" -e "*) exit ${UV_FAILS:-0} ;; esac
"""


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def house(tmp_path, root):
    "A folder with the set-up script, and a `bin` that comes first on PATH."
    (tmp_path / "tools").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("setup.sh", "uv_settings.py"):
        shutil.copy(root / "tools" / name, tmp_path / "tools")
    shutil.copy(root / "constraints.txt", tmp_path)
    script(tmp_path / "pip_stand_in", PIP_STAND_IN)
    script(tmp_path / "uv_stand_in", UV_STAND_IN)
    script(tmp_path / "bin/uname", "#!/bin/sh\necho Linux\n")
    return tmp_path


def pythons(house, **versions):
    "Interpreters by name: `python3='3.9'`; `+` after it means that it has its venv module."
    for name in NAMES:
        version = versions.get(name.replace(".", "_"), "")
        no_venv = int(not version.endswith("+"))
        text = FAKE_PYTHON.format(version=version.rstrip("+"), no_venv=no_venv)
        script(house / "bin" / name, text if version else "#!/bin/sh\nexit 127\n")


def setup(house, *what, **env):
    known = {"PATH": f"{house / 'bin'}:/usr/bin:/bin", "PYTHON": "", "SFTLAB_NEED_MB": "1"}
    known |= {"UV_THERE": "", "UV_FIND_LINKS": ""}
    return subprocess.run(["sh", "tools/setup.sh", *what], cwd=house, env=os.environ | known | env,
                          capture_output=True, text=True, timeout=60)


def calls(house):
    path = house / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10", "3.14"])
def test_a_python_outside_the_range_is_named(house, version):
    pythons(house, python3=version + "+")
    done = setup(house)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"python3 is {version}" in done.stderr and "3.11, 3.12 or 3.13" in done.stderr


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
    assert not (house / ".venv/.installed").exists(), "a broken update passes for a finished one"


@pytest.mark.parametrize("uv", ["", "yes"])
@pytest.mark.parametrize("system, card, tried", [
    ("Linux", False, True), ("Linux", True, False), ("Darwin", False, False)])
def test_cpu_wheels_of_torch_are_tried_where_they_save_gigabytes(house, system, card, tried, uv):
    pythons(house, python3="3.11+")
    script(house / "bin/uname", f"#!/bin/sh\necho {system}\n")
    if card:
        script(house / "bin/nvidia-smi", "#!/bin/sh\n")
    elif shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("this machine has an NVIDIA card")
    done = setup(house, UV_THERE=uv)
    assert done.returncode == 0  # even though the index is out of reach
    assert any("download.pytorch.org/whl/cpu" in c for c in calls(house)) == tried
    assert "install -c constraints.txt -e .[lab]" in calls(house)[-1]


def test_uv_installs_and_is_told_of_pips_settings(house):
    pythons(house, python3="3.11+")
    assert setup(house, UV_THERE="yes").returncode == 0
    last = calls(house)[-1]
    assert last.startswith("uv --no-config pip install -c constraints.txt -e .[lab]")
    assert last.endswith("from /a/folder")


def test_where_uv_cannot_be_had_pip_installs(house):
    pythons(house, python3="3.11+")
    done = setup(house)
    assert done.returncode == 0 and (house / ".venv/.installed").exists()
    assert calls(house)[-1] == (
        "-m pip --disable-pip-version-check install -c constraints.txt -e .[lab]")


def test_where_uv_fails_pip_tries(house):
    pythons(house, python3="3.11+")
    done = setup(house, UV_THERE="yes", UV_FAILS="1")
    assert done.returncode == 0 and "pip tries" in done.stderr
    assert calls(house)[-1].startswith("-m pip")
    assert setup(house, UV_THERE="yes", UV_FAILS="1", PIP_FAILS="1").returncode == 1


@pytest.mark.parametrize("what, extras, marks", [
    ("lab", "[lab]", [".installed"]), ("dev", "[lab,dev]", [".installed", ".installed-dev"])])
def test_a_learner_gets_no_tools_of_the_tests(house, what, extras, marks):
    pythons(house, python3="3.11+")
    assert setup(house, what).returncode == 0
    assert calls(house)[-1].endswith(f"-e .{extras}")
    assert sorted(p.name for p in (house / ".venv").glob(".installed*")) == marks


def uv_settings(root):
    spec = importlib.util.spec_from_file_location("uv_settings", root / "tools/uv_settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.variables


def test_pips_settings_become_uvs(root):
    listed = "\n".join([
        "global.index-url='https://a.example/simple'",
        "global.extra-index-url='https://b.example/simple\\nfile:///c d'".replace(" d", ""),
        ":env:.find-links='/opt/wheels /more'",
        "global.find-links='/old'",
        "global.quiet='1'"])
    assert uv_settings(root)(listed) == {
        "UV_DEFAULT_INDEX": "https://a.example/simple",
        "UV_INDEX": "https://b.example/simple file:///c",
        "UV_FIND_LINKS": "/opt/wheels,/more",
        "UV_INDEX_STRATEGY": "unsafe-best-match"}
    assert uv_settings(root)("") == {}
