"""Stored tasks: files of this package and folders of PEFT."""
