"""Print pip's settings in the form that uv reads: eval "$(python tools/uv_settings.py)"

uv ignores pip's files and variables. Where pip was told of another index or of a folder of wheels,
uv must be told too, or it finds other packages than pip would.
"""
import ast
import os
import shlex
import subprocess
import sys

NAMES = {  # pip's name -> uv's variable, and what separates several values there
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "no-index": ("UV_NO_INDEX", " "),
}


def variables(
    listed:str, # what `pip config list` prints: lines such as `global.find-links='/opt/wheels'`
) -> dict: # uv's variables and their values
    "pip's settings in uv's words. One in the environment goes before one in a file, as with pip."
    found = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in NAMES:
            variable, separator = NAMES[name]
            found[variable] = separator.join(ast.literal_eval(value).split())
    if found.keys() & {"UV_INDEX", "UV_FIND_LINKS"}:
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip: the best, wherever it is
    return found


if __name__ == "__main__":
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name, value in variables(listed).items():
        if name not in os.environ:
            print(f"export {name}={shlex.quote(value)}")
