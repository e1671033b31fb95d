"""Stages of run.sh: what each of them runs, which are finished, which resume."""
