"""The programs: thin command lines that parse, call one function, and report."""
