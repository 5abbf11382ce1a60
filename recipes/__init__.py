"""Training and evaluation of the embedded checkpoint.

Every stage is a module with a command line (``python -m recipes.prepare``) and one YAML file of
the same name that holds its settings. See README.md beside this file.
"""
