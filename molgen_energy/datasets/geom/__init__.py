"""The forms in which GEOM-Drugs is passed on, one file for each; `recognition` tells them apart."""
