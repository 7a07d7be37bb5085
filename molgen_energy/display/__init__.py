"""HTML for notebooks and pages: molecules in three dimensions and curves, without network."""
