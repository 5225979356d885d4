"Google Drive: a folder."
import os


def mount(mountpoint, force_remount=False, **options):
    os.makedirs(os.path.join(mountpoint, "MyDrive"), exist_ok=True)
    print(f"Mounted at {mountpoint}")


def flush_and_unmount(**options):
    pass
