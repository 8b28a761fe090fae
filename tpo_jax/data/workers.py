"""Worker processes that do not outlive the program that started them."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """For the start of a worker: it ends as soon as its parent does, even by kill -9.

    Otherwise it would wait for work for ever, and keep its memory.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
