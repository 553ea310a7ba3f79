"""How a run is shown: properties of test reports, the terminal."""
