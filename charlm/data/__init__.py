"""The data that ships with charlm; README.md beside this file says where it comes from."""
