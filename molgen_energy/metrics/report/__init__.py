"""The report of an evaluation: its model, and renderers for table, JSON and HTML page."""
