"""The commands of ``sagellm``, a module each.

These modules import click and little else, so that help and completion are quick; what a command
needs is loaded when it runs.
"""
