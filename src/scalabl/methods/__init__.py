"""What is compared: each method and each rival, one file each."""
