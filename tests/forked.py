"""Run a notebook in a copy of a process that has imported the libraries already.

Python, Jupyter and torch take five seconds to start, more than most reference notebooks run. One
process (of `multiprocessing`'s fork server) imports them once; each notebook gets a copy of it, and
its kernel a copy of that, with nothing of another notebook in it and no module of the course.
Only on Linux: elsewhere a copy may lack what the libraries have started.
"""
import asyncio
import gc
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

LIBRARIES = ["ipykernel.kernelapp", "jupyter_client.provisioning.local_provisioner", "nbclient",
             "nbformat", "matplotlib.pyplot", "numpy", "pandas", "torch", "transformers"]
HERE = Path(__file__).resolve().parent
CAN_COPY = sys.platform == "linux"


class Copy:
    "A kernel in a copy of this process, with what jupyter_client wants of a `subprocess.Popen`."
    stdin = stdout = stderr = returncode = None

    def __init__(self, command, cwd=None, env=None, **options):
        self.pid = os.fork()
        if self.pid == 0:
            become_kernel(command[command.index("-f"):], cwd, env, os.getppid())
        os.setpgid(self.pid, self.pid)  # before anybody asks: signals go to its group

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        while self.poll() is None:
            time.sleep(.02)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def become_kernel(words, cwd, env, parent):
    "Never returns. The copy forgets that it is inside a running event loop."
    status = 1
    try:
        from ipykernel.kernelapp import IPKernelApp
        os.setpgid(0, 0)
        asyncio.events._set_running_loop(None)
        asyncio.set_event_loop(asyncio.new_event_loop())
        os.environ.update(env)
        os.chdir(cwd)
        sys.argv[:] = ["ipykernel_launcher", *words]
        IPKernelApp.launch_instance(argv=words, parent_handle=parent)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def execute(path, limit, said, variables):
    "In the copy: run a notebook, and write to the file `said` what went wrong."
    import nbformat
    from jupyter_client.provisioning import local_provisioner
    from nbclient import NotebookClient
    gc.freeze()  # what is here for good need not be searched for garbage, again and again
    os.environ.update(variables)
    sys.path[:] = ["", *(p for p in sys.path if p != str(HERE))]  # tests have put theirs there
    spec = importlib.util.spec_from_file_location("offline", HERE / "offline/sitecustomize.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    local_provisioner.launch_kernel = Copy
    folder = str(Path(path).parent)
    client = NotebookClient(nbformat.read(path, 4), timeout=limit, kernel_name="python3",
                            resources={"metadata": {"path": folder}})
    try:
        client.execute()
    except Exception as error:
        Path(said).write_text(f"{type(error).__name__}: {error}")


def server():
    "The fork server, which starts with its first use."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def run_copy(path, limit, variables):
    "Run a notebook; a RuntimeError says what went wrong."
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        copy = server().Process(target=execute, args=(path, limit, said, variables))
        copy.start()
        copy.join(limit + 30)
        if copy.is_alive():
            copy.kill()  # its kernel looks for it every second, and ends too
            raise RuntimeError(f"not done after {limit + 30:.0f} s")
        if said.exists():
            raise RuntimeError(said.read_text())
        if copy.exitcode:
            raise RuntimeError(f"the process ended with {copy.exitcode}")
