"""The stand-in base image's pip: records what it was asked, and installs from the image itself."""
