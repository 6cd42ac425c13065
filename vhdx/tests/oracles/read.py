"""Reads a whole virtual disk with a foreign library and prints its SHA-256.

read.py libvhdi|dissect IMAGE [PARENT...]      parents: the nearest first
"""

import hashlib
import sys

# Whole blocks of any block size from their start: dissect reads partly present blocks right only so.
STEP = 1 << 20


def of_libvhdi(paths):
    import pyvhdi

    images = []
    for path in paths:
        image = pyvhdi.file()
        image.open(path)
        images.append(image)
    for child, parent in zip(images, images[1:]):
        child.set_parent(parent)
    return images[0].get_media_size(), images[0].read_buffer_at_offset


def of_dissect(paths):
    from pathlib import Path

    from dissect.hypervisor.disk.vhdx import VHDX

    # It finds parents by itself, from the paths in the image.
    disk = VHDX(Path(paths[0]))
    stream = disk.open() if hasattr(disk, "open") else disk

    def read(size, offset):
        stream.seek(offset)
        return stream.read(size)

    return disk.size, read


def main():
    tool, *paths = sys.argv[1:]
    size, read = {"libvhdi": of_libvhdi, "dissect": of_dissect}[tool](paths)
    digest = hashlib.sha256()
    for offset in range(0, size, STEP):
        length = min(STEP, size - offset)
        content = read(length, offset)
        if len(content) != length:
            sys.exit(f"{len(content)} of {length} bytes at {offset}")
        digest.update(content)
    print(digest.hexdigest())


main()
