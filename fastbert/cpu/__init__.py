"""Launchers of the C++ implementations: same names and arguments as the operators, CPU tensors in and out.

Importing one of the modules raises ImportError where the extension was not built.
"""
