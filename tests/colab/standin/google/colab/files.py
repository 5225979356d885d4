"Upload and download. SFTLAB_COLAB_UPLOAD names the file that is picked; without it, none is."
import os
import shutil


def upload(target_dir=""):
    picked = os.environ.get("SFTLAB_COLAB_UPLOAD")
    if not picked:
        return {}
    name = os.path.basename(picked)
    shutil.copy(picked, os.path.join(target_dir, name))
    with open(picked, "rb") as file:
        return {name: file.read()}


def download(filename):
    if not os.path.exists(filename):
        raise FileNotFoundError(f"Cannot find file: {filename}")
