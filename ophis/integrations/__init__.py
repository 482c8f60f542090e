"""Ophis within other libraries, on request: nothing here is imported by the rest of the package."""
