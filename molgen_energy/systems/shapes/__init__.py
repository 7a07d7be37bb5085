"""Regular polygons: data, training, sampling and metrics."""
