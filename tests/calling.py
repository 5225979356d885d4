"The program, called in this process."
import contextlib
import io

from sftlab import cli


def call(*words):
    "Exit status, stdout and stderr of one command."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(map(str, words)))
    return status, out.getvalue(), err.getvalue()
