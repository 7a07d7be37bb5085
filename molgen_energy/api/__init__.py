"""The functions behind the commands, one file each."""
