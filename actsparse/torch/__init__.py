"""The torch backend: masks on modules, and what is measured of them."""
