"""The structured files of this package: what each holds, declared once, and checked when read."""
