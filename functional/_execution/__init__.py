"""Execution: a binding, a call's trees and its inputs meet in a skeleton."""
