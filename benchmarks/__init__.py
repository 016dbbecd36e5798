"""What a performance claim is measured with."""
