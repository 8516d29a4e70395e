"""What engines that serve adapters take of PEFT's format, and files in a form that they take."""
