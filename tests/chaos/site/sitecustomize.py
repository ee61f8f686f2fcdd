"""Imported by Python as it starts when this folder is on PYTHONPATH: how faults reach processes that Ray starts."""

import os

if os.environ.get("HEADTAIL_CHAOS"):
    from chaos import faults

    faults.hook()
