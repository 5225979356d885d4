"""A JupyterLab server of our own, and a browser page to drive it with.

These are the pieces of the browser tests.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil
import pytest
from playwright.sync_api import TimeoutError, sync_playwright

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
            "/Applications/Chromium.app/Contents/MacOS/Chromium"]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
SETTINGS = {  # every cell in the page, also those out of sight; no news, no questions
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false",
                                                    "checkForUpdates": False}}
IDLE = """() => { const widget = window.jupyterapp?.shell.currentWidget
    const prompts = [...(widget?.node.querySelectorAll('.jp-InputPrompt') ?? [])]
    return !!widget?.context?.isReady && widget.sessionContext.isReady
        && widget.sessionContext.session?.kernel?.status === 'idle'
        && !prompts.some(p => p.innerText.includes('*')) }"""


def find_browser() -> str: # path of the program
    """The first browser there is.

    Without one the test is skipped, or fails where `CI` says that there must be one.
    """
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    give_up("no chromium or google-chrome on PATH: install one to run the browser tests")


def write_notebook(
    path:Path, # where to
    *sources:str, # one a code cell
):
    "A notebook of code cells without outputs."
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = dict.fromkeys(("name", "display_name"), "python3")
    notebook.metadata["kernelspec"]["language"] = "python"
    nbformat.write(notebook, path)


def environment(
    home:Path, # folder for all that Jupyter keeps
) -> dict: # environment variables of the server
    "Jupyter with settings of its own, and none of the user's."
    for name, values in SETTINGS.items():
        file = home/"settings"/f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    folders = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
               "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_CONFIG_DIR": "config",
               "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython"}
    return os.environ | {name: str(home/folder) for name, folder in folders.items()}


def stop(
    server:subprocess.Popen, # the leader of a session of its own
):
    "End the server, then what is left of its kernels (each has a process group of its own)."
    family = [psutil.Process(server.pid)] if server.poll() is None else []
    family += [child for process in family for child in process.children(recursive=True)]
    if family:
        os.killpg(server.pid, signal.SIGTERM)
    for process in psutil.wait_procs(family, timeout=20)[1]:
        process.kill()
    server.wait()


@contextmanager
def jupyterlab(
    folder:Path, # the learner's folder, made where it is missing
    timeout:float=180, # seconds until the server must answer
):
    """What `sftlab lab folder` serves, as the address it prints.

    The server and its kernels end with the block.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = Path(f"{folder}.jupyter")
    home.mkdir(parents=True)
    command = [sys.executable, "-m", "sftlab.cli", "lab", str(folder), "--no-browser",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", "--expose-app-in-browser"]
    with open(home/"log", "w") as log:
        server = subprocess.Popen(command, env=environment(home), stdout=log, stderr=log,
                                  start_new_session=True)
    try:
        deadline = time.monotonic() + timeout
        address = re.compile(rf"http://127\.0\.0\.1:{port}\S*")
        while not (found := address.search((home/"log").read_text())):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start:\n" + (home/"log").read_text())
            time.sleep(.2)
        yield found[0]
    finally:
        stop(server)


@contextmanager
def browser_page(
    address:str, # of the server
):
    "A fresh page of a browser without a window."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=QUIET)
        yield browser.new_page(base_url=address, viewport={"width": 1280, "height": 900})
        browser.close()


def wait_idle(
    page,
    timeout:float=120, # seconds
):
    "Wait until a notebook is open, its kernel is idle and no cell is waiting for its turn."
    page.wait_for_function(IDLE, timeout=timeout*1000)


def open_notebook(
    page,
    name:str, # path from the server's folder
):
    "Open a notebook and wait for its kernel."
    page.goto(f"/lab/tree/{name}?reset")
    wait_idle(page)


def run_all(
    page,
    timeout:float=900, # seconds
):
    "Clear the notebook that is open, run all its cells and wait until the kernel is idle."
    page.evaluate("""() => { window.ran = false
        jupyterapp.commands.execute('notebook:clear-all-cell-outputs')
          .then(() => jupyterapp.commands.execute('notebook:run-all-cells'))
          .finally(() => window.ran = true) }""")
    page.wait_for_function("() => window.ran", timeout=timeout*1000)
    wait_idle(page, timeout)


def replace_cell(
    page,
    begins:str, # how the code cell begins
    source:str, # what it is to hold
):
    "Write into a cell of the notebook that is open, run it and the next one."
    page.evaluate("""([begins, source]) => {
        const content = jupyterapp.shell.currentWidget.content
        const isIt = cell => cell.model.sharedModel.getSource().startsWith(begins)
        content.activeCellIndex = content.widgets.findIndex(isIt)
        content.activeCell.model.sharedModel.setSource(source) }""", [begins, source])
    for _ in range(2):
        page.evaluate("() => jupyterapp.commands.execute('notebook:run-cell-and-select-next')")
    wait_idle(page)


def errors(
    page,
) -> list: # one line of text each
    "What went wrong in the notebook that is open: errors, and code cells that did not run."
    found = []
    cells = page.evaluate("() => jupyterapp.shell.currentWidget.content.model.toJSON().cells")
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        for out in cell["outputs"]:
            if out["output_type"] == "error":
                found.append(f"cell {number}: {out['ename']}: {out['evalue']}")
        if cell["execution_count"] is None and "".join(cell["source"]).strip():
            found.append(f"cell {number} did not run")
    return found


def ask(
    page,
    prompt:str, # what a learner types
    timeout:float=180, # seconds until the answers must be there
) -> str: # the text shown afterwards
    """Type `prompt` into the side-by-side widget, press Generate, and wait for three answers that
    were not there before."""
    shown = page.locator(".sftlab-side-by-side")
    before = shown.inner_text()
    box = page.get_by_placeholder("Type a prompt")
    box.fill("")
    box.press_sequentially(prompt)
    page.get_by_role("button", name="Generate").click()
    try:
        page.wait_for_function("""before => {
            const text = document.querySelector('.sftlab-side-by-side')?.innerText ?? before
            const told = label => text.toLowerCase().includes(label)
            return text !== before && ['base', 'few-shot', 'instruct'].every(told) }""",
            arg=before, timeout=timeout*1000)
    except TimeoutError:
        raise AssertionError(f"no new answers to {prompt!r}: {shown.inner_text()!r}") from None
    wait_idle(page, timeout)
    return shown.inner_text()


def screenshot(
    page,
    name:str, # of the picture, without its ending
    folder:Path, # used unless SFTLAB_SCREENSHOTS names another
) -> Path: # the PNG
    "A picture of what the page shows, once it has come to rest."
    path = Path(os.environ.get("SFTLAB_SCREENSHOTS") or folder)/f"{name}.png"
    page.evaluate("""() => { const widget = jupyterapp.shell.currentWidget
        return widget.sessionContext.session.kernel.requestKernelInfo() }""")
    page.wait_for_timeout(400)
    wait_idle(page)
    page.screenshot(path=path)
    return path
