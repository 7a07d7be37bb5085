"""Properties of molecules, predicted from elements and positions."""
