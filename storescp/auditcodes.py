"""Codes in audit messages: DICOM's, those that it took over from RFC 3881, and our own.

Source: DICOM PS3.16 Annex D, CID 400 to 403; PS3.15 A.5.1.2.
"""

from __future__ import annotations

from storescp.auditmessage import OWN_SCHEME, Code

ACTIVITY = Code("110100", "DCM", "Application Activity")
LOG_USED = Code("110101", "DCM", "Audit Log Used")
ACCESSED = Code("110103", "DCM", "DICOM Instances Accessed")
TRANSFERRED = Code("110104", "DCM", "DICOM Instances Transferred")
DELETED = Code("110105", "DCM", "DICOM Study Deleted")
EXPORT = Code("110106", "DCM", "Export")
QUERY = Code("110112", "DCM", "Query")
ALERT = Code("110113", "DCM", "Security Alert")
AUTHENTICATION = Code("110114", "DCM", "User Authentication")

START = Code("110120", "DCM", "Application Start")
STOP = Code("110121", "DCM", "Application Stop")
LOGIN = Code("110122", "DCM", "Login")
LOGOUT = Code("110123", "DCM", "Logout")
NODE = Code("110126", "DCM", "Node Authentication")
NETWORK = Code("110128", "DCM", "Network Configuration")
SECURITY = Code("110129", "DCM", "Security Configuration")
SOFTWARE = Code("110131", "DCM", "Software Configuration")
RESTRICTED = Code("110132", "DCM", "Use of Restricted Function")
STOPPED = Code("110133", "DCM", "Audit Recording Stopped")
RECORDING = Code("110134", "DCM", "Audit Recording Started")
OBJECT = Code("110135", "DCM", "Object Security Attributes Changed")
USER = Code("110137", "DCM", "User security Attributes Changed")

APPLICATION = Code("110150", "DCM", "Application")
DESTINATION = Code("110152", "DCM", "Destination Role ID")
SOURCE = Code("110153", "DCM", "Source Role ID")
STUDY_UID = Code("110180", "DCM", "Study Instance UID")
NODE_ID = Code("110182", "DCM", "Node ID")
PATIENT_NUMBER = Code("2", "RFC-3881", "Patient Number")
URI = Code("12", "RFC-3881", "URI")
CRITERIA = Code("10", "RFC-3881", "Search Criteria")
RECORD = Code("audit-record", OWN_SCHEME, "Record of the audit chain")
HEAD = Code("audit-head", OWN_SCHEME, "Signed head of the audit chain")
