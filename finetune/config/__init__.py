"""What will run: methods, profiles and the plan that they give."""
