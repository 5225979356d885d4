"""Run notebooks as somebody on Colab does: python tests/colab/run.py [--freeze FILE] [NOTEBOOK …]

In an environment with Colab's own versions (freeze.txt, or a newer list) and a stand-in for
google.colab. Each notebook begins bare: alone in a folder, nothing of the course installed. Its own
cell installs the course, from a repository with the files as they are now. Then the kernel is
restarted and all is run from the top; where RUN_ON says so, all is run at once instead.

The environment is kept in .colab/, and is made anew when the list has changed. COLAB_PYTHON names
an interpreter of Colab's version, where uv finds none and cannot bring one.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from freeze import HERE, ROOT, concerned, main as compare, python_version, read
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from packaging.utils import canonicalize_name
from tqdm import tqdm

from sftlab.labs.sharing import sample_file

sys.path[:0] = [str(ROOT / "tools")]
from colab import settings  # noqa: E402
from uv_settings import variables  # noqa: E402

PLACE = ROOT / ".colab"
PYTHON = PLACE / "env/bin/python"
RUN_ON = ("nbs/01_base_vs_instruct.ipynb", "nbs/07_lora.ipynb")  # all at once, no restart
CHOSEN = ["nbs/01_base_vs_instruct.ipynb", "nbs/04_loss_masking.ipynb", "nbs/07_lora.ipynb",
          "exercises/04_masking.ipynb"]
NOT_CONSTRAINED = ("nvidia-", "cuda-", "triton")  # come with the build of torch that is found
KERNEL = "colab"


def call(*words, **kwargs):
    return subprocess.run([str(w) for w in words], check=True, text=True, **kwargs)


# --- the environment

def uv(*words, **env):
    listed = call(sys.executable, "-m", "pip", "config", "list", stdout=subprocess.PIPE).stdout
    env = os.environ | variables(listed) | env
    call(Path(sys.executable).parent / "uv", "--no-config", "pip", *words, "--python", PYTHON,
         env=env)


def torch_of(freeze) -> str: # the line of a list, or a plain pin
    "Colab's own wheel of torch, which has no CUDA."
    lines = Path(freeze).read_text().splitlines()
    return next(line for line in lines if line.startswith("torch @"))


def make_environment(freeze):
    "Colab's versions of what the course meets; the rest of Colab's 600 packages is left out."
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    version = python_version(freeze)
    call(Path(sys.executable).parent / "uv", "--no-config", "venv", "--quiet", "--seed", "--python",
         os.environ.get("COLAB_PYTHON", version), PLACE / "env")
    try:
        uv("install", "--quiet", "--no-deps", torch_of(freeze), UV_HTTP_TIMEOUT="10",
           UV_HTTP_RETRIES="0")
    except subprocess.CalledProcessError:
        print("Colab's own wheel of torch is out of reach: the usual index has a larger one.")
    pins = {name: v for name, v in read(freeze).items() if not name.startswith(NOT_CONSTRAINED)}
    lines = [f"{name}=={v}" for name, v in pins.items()]
    (PLACE / "pins.txt").write_text("\n".join(lines) + "\n")
    uv("install", "--quiet", "-c", PLACE / "pins.txt", *(n for n in concerned() if n in pins))
    site = call(PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
                stdout=subprocess.PIPE).stdout.strip()
    Path(site, "standin.pth").write_text(f"{HERE / 'standin'}\n")
    config = PLACE / "env/etc/ipython/ipython_config.py"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("c.InteractiveShellApp.extensions = ['google.colab']\n")
    (PLACE / "bare.txt").write_text("\n".join(installed()) + "\n")
    shutil.copy(freeze, PLACE / "freeze.txt")  # last: without it, an earlier try was broken off


def installed() -> list: # such as "numpy==2.1.3"
    words = [Path(sys.executable).parent / "uv", "--no-config", "pip", "freeze", "--python", PYTHON]
    return call(*words, stdout=subprocess.PIPE).stdout.splitlines()


def kernel(folder):
    "Tell Jupyter of the environment's kernel; return the variables that make it known."
    spec = Path(folder) / "kernels" / KERNEL
    spec.mkdir(parents=True)
    argv = [str(PYTHON), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps(dict(
        argv=argv, display_name=KERNEL, language="python")))
    return {"JUPYTER_PATH": str(folder), "COLAB_RELEASE_TAG": "stand-in",
            "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"}


# --- the course, as pip finds it

def repository(folder) -> dict: # variables that lead git there
    "A repository with the project's files as they are now, in place of the one on GitHub."
    listed = call("git", "-c", "core.quotePath=off", "ls-files", "--cached", "--others",
                  "--exclude-standard", cwd=ROOT, stdout=subprocess.PIPE).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(folder) / name)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", folder]
    call(*git, "init", "--quiet", "--initial-branch", settings()["branch"])
    call(*git, "add", "--all")
    call(*git, "commit", "--quiet", "--message", "as it is now")
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{folder}.insteadOf",
            "GIT_CONFIG_VALUE_0": settings()["git_url"]}


# --- a notebook

def run(client, cells, first):
    "Run some cells in a kernel; return the seconds they took."
    began = time.perf_counter()
    for i, cell in enumerate(tqdm(cells, unit="cell", mininterval=2), first):
        if cell.cell_type == "code":
            client.execute_cell(cell, i)
    return time.perf_counter() - began


LOADED = """
import sys
from importlib.metadata import packages_distributions
owners = packages_distributions()
print(*{name for module in [*sys.modules] for name in owners.get(module, [])})
"""


def loaded(client) -> set: # of names
    "The packages that the kernel has imported so far."
    cell = nbformat.v4.new_code_cell(LOADED)
    client.nb.cells.append(cell)
    client.execute_cell(cell, len(client.nb.cells) - 1)
    client.nb.cells.pop()
    return set(map(canonicalize_name, said(cell).split()))


def said(cell) -> str:
    return "".join(o.get("text", "") for o in cell.outputs)


def try_notebook(page, env) -> dict: # seconds, and what Colab would offer to restart for
    "Run a notebook from nothing. Raises what its cells raise."
    bare = (PLACE / "bare.txt").read_text().splitlines()
    uv("sync", "--quiet", PLACE / "bare.txt")
    with tempfile.TemporaryDirectory() as content:
        path = shutil.copy(ROOT / page, content)
        book = nbformat.read(path, 4)
        place = next(i for i, c in enumerate(book.cells) if c.get("id") == "colab-install")
        client = NotebookClient(book, timeout=1200, kernel_name=KERNEL,
                                resources={"metadata": {"path": content}})
        with client.setup_kernel(env=env):
            before = loaded(client)
            install = run(client, book.cells[:place + 1], 0)
            assert "Installed" in said(book.cells[place]), said(book.cells[place])[-2000:]
            gone = {line.partition("==")[0] for line in set(bare) - set(installed())}
            stale = sorted(before & set(map(canonicalize_name, gone)))
            found = dict(install=install, restart=stale)
            if page in RUN_ON and not stale:
                return found | dict(rest=run(client, book.cells[place + 1:], place + 1))
        with client.setup_kernel(env=env):
            found |= dict(rest=run(client, book.cells, 0))
            assert said(book.cells[place]) == "", "installed a second time"
        return found


def report(page, env) -> bool: # whether all went well
    try:
        found = try_notebook(page, env)
    except (CellControlSignal, DeadKernelError, AssertionError) as error:
        print(f"FAILED  {page}\n{error}", flush=True)
        return False
    how = "no restart offered"
    if found["restart"]:
        how = f"restart offered for {', '.join(found['restart'])}"
    print(f"ok      {page}: installed in {found['install']:.0f} s ({how}), run in "
          f"{found['rest']:.0f} s", flush=True)
    return True


def main(pages, freeze):
    if not (PLACE / "freeze.txt").exists() or \
            (PLACE / "freeze.txt").read_text() != Path(freeze).read_text():
        make_environment(freeze)
    with tempfile.TemporaryDirectory() as folder:
        made = repository(f"{folder}/course")
        env = os.environ | made | kernel(f"{folder}/jupyter")
        os.environ["JUPYTER_PATH"] = env["JUPYTER_PATH"]
        sample_file(f"{folder}/rows.jsonl")
        env["SFTLAB_COLAB_UPLOAD"] = f"{folder}/rows.jsonl"  # what a learner picks in lab 2
        place, ours = Path("/content"), not Path("/content").exists()
        good = [report(page, env) for page in pages]
        if ours:  # the stand-in's Drive
            shutil.rmtree(place, ignore_errors=True)
    print(f"{sum(good)} passed, {len(good) - sum(good)} failed")
    return not all(good)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--freeze", default=HERE / "freeze.txt")
    parser.add_argument("pages", nargs="*")
    chosen = parser.parse_args()
    compare(chosen.freeze)
    labs = [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("nbs/labs/*.ipynb"))]
    sys.exit(main(chosen.pages or CHOSEN + labs, chosen.freeze))
