"""The miniature: its data, and the scripts around it. README.md beside this file."""
