"""The live page at ``/``, and the figures that it draws."""
