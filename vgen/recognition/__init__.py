"""Video classifiers: methods of modelling time, behind one interface."""

from vgen.recognition.network import RecognizerOutput
from vgen.recognition.recognizer import NETWORKS, Recognizer, create_recognizer, load_recognizer

__all__ = ["NETWORKS", "Recognizer", "RecognizerOutput", "create_recognizer", "load_recognizer"]
