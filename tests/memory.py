"""How much memory a script takes."""

# For scripts: anonymous memory now, and at its peak while some work is done, in bytes.
PEAK_OF = """
import threading

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def peak_of(work):
    peak, done = anonymous(), threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak
"""
