"""Counts the machine instructions of CUDA kernels; `build_tools.sass_report` prints the table."""
