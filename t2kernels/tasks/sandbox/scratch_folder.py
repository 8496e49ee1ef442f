"""The folder that a program may write to: limits on its content, and its removal. Standard library only.

A program can nest folders deeper than a recursive function goes, and deeper than a path may be long. Nothing here
recurses.
"""

import contextlib
import itertools
import os


def excess(folder: str, most_bytes: int, most_files: int) -> str:
    """The limit that the content of a folder breaks, in words; "" if it breaks none.

    It stops at the first broken limit, so its time is bounded by `most_files`, whatever the program makes meanwhile.
    """
    count = size = 0
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                found = list(itertools.islice(entries, most_files - count + 1))
        except (FileNotFoundError, NotADirectoryError):
            continue  # the program removed or replaced it
        except OSError as error:  # ENAMETOOLONG, or EACCES: a folder that may be written, but not listed
            return f"made a folder that cannot be looked into: {error.strerror}"
        count += len(found)
        if count > most_files:
            return f"made more than {most_files} files and folders"
        for entry in found:
            with contextlib.suppress(FileNotFoundError):
                size += entry.stat(follow_symlinks=False).st_blocks * 512
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
        if size > most_bytes:
            return f"wrote more than {most_bytes} bytes"
    return ""


def remove(folder: str) -> None:
    """Remove a folder and all that is in it, once nothing writes to it any more. Raises OSError.

    A folder inside is not descended into: its subfolders are moved up to `folder`, then it is empty and can go.
    """
    os.chmod(folder, 0o700)
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        moved = 0
        waiting = _with_content(top)
        while waiting:
            name = waiting.pop()
            os.chmod(name, 0o700, dir_fd=top)  # the program may have made it unreadable
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            try:
                for below in _with_content(inner):
                    os.chmod(below, 0o700, dir_fd=inner)  # to move a folder is to write to it
                    while os.path.lexists(f"{folder}/{moved}"):
                        moved += 1
                    os.rename(below, str(moved), src_dir_fd=inner, dst_dir_fd=top)
                    waiting.append(str(moved))
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(folder)


def _with_content(at: int) -> list[str]:
    """Remove files and empty folders from the folder open as `at`: the names of the folders left.

    To open each of thousands of empty folders takes many times as long as the program took to make them.
    """
    with os.scandir(at) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    left = []
    for name, is_folder in found:
        if not is_folder:
            os.unlink(name, dir_fd=at)
            continue
        try:
            os.rmdir(name, dir_fd=at)
        except OSError:  # it is not empty
            left.append(name)
    return left
