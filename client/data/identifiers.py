"""What in a DICOM header points at a person, and may not be there when a model is trained.

The list follows DICOM PS3.15, Annex E, Table E.1-1 (Basic Application Level Confidentiality Profile, 2026c): of its 650
attributes those that name, address or describe a person, or hold free text in which people do. Dates and UIDs, which the
profile also replaces, are no direct identifiers and are not looked for: no header ever leaves a site, this guards against
carelessness.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

PRIVATE = "PrivateTags"  # all of them, and those that no dictionary knows: nobody can tell what is written there
BURNED_IN = "BurnedInAnnotation"
FACES = "RecognizableVisualFeatures"

# every non-empty person's name (VR PN) counts too, wherever it stands
_ATTRIBUTES = """
    PatientBirthDate PatientBirthTime PatientAddress PatientTelephoneNumbers PatientTelecomInformation
    PatientInstitutionResidence OtherPatientIDs OtherPatientIDsSequence ReferencedPatientAliasSequence
    ReferencedPatientPhotoSequence MedicalRecordLocator PatientInsurancePlanCodeSequence InsurancePlanIdentification
    IssuerOfPatientID AdmissionID ServiceEpisodeID AccessionNumber MilitaryRank BranchOfService Occupation
    PatientReligiousPreference EthnicGroup CountryOfResidence RegionOfResidence CurrentPatientLocation
    ResponsibleOrganization PersonAddress PersonTelephoneNumbers PersonTelecomInformation ReferringPhysicianAddress
    ReferringPhysicianTelephoneNumbers OrderCallbackPhoneNumber OrderCallbackTelecomInformation InstitutionAddress
    PersonIdentificationCodeSequence OriginalAttributesSequence ModifiedAttributesSequence
    NonconformingModifiedAttributesSequence DigitalSignaturesSequence GPSLatitude GPSLongitude PatientComments
    AdditionalPatientHistory PatientState SpecialNeeds MedicalAlerts Allergies AdmittingDiagnosesDescription ImageComments
    FrameComments StudyComments VisitComments ResultsComments AcquisitionComments IdentifyingComments TextComments
    TextString UnformattedTextValue InterpretationText Impressions RequestedProcedureComments ImagingServiceRequestComments
    ImagePresentationComments CommentsOnThePerformedProcedureStep CommentsOnRadiationDose ReasonForStudy ReasonForVisit
    ReasonForTheRequestedProcedure ReasonForTheImagingServiceRequest ServiceEpisodeDescription DischargeDiagnosisDescription
    ContentSequence GraphicAnnotationSequence EncapsulatedDocument IconImageSequence
    StudyID RequestedProcedureID ScheduledProcedureStepID PerformedProcedureStepID
    PlacerOrderNumberImagingServiceRequest FillerOrderNumberImagingServiceRequest
    StudyDescription SeriesDescription ProtocolName RequestedProcedureDescription ScheduledProcedureStepDescription
    PerformedProcedureStepDescription
"""
IDENTIFIERS = frozenset(_ATTRIBUTES.split())

# where names and numbers are commonly painted into the pixels, so that silence about it is not enough
TEXT_MODALITIES = ("US", "IVUS", "ES", "XC", "GM", "SM", "OT", "SC", "DOC", "OP")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and what begins so: its multi-frame kinds
DRAWN = (0x5000, 0x6000)  # curves and overlays, in repeating groups 50xx and 60xx: names may be drawn there
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)

# a name that says that there is none, or a pseudonym of `wardround deidentify`
_NO_NAME = re.compile(r"(anonym\w*|anon|de-?identified|removed|unknown|none|x+)?[\s^_-]*\d*[\s^]*|P[0-9A-F]{20}", re.IGNORECASE)
_NO_ID = re.compile(r"(anonym\w*|anon|de-?identified|removed|unknown|none|null|nan?|test|[x?0. _-]*)", re.IGNORECASE)


@contextmanager
def quietly() -> Iterator[None]:
    """Without pydicom's warnings, which quote values, on the screen or in a log."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def identifiers(dataset: Dataset, allowed: Collection[str] = ()) -> list[str]:
    """Keywords of what still points at a person in a header, at any depth, in order; without those in `allowed`."""
    with quietly():
        found = dict.fromkeys(_in_elements(dataset))
        if any(tag in dataset for tag in PIXELS):
            found |= dict.fromkeys(_in_pixels(dataset))
    return [keyword for keyword in found if keyword not in allowed]


def is_placeholder(patient: str) -> bool:
    """Whether a patient id is none: empty, or a word that many patients would share and so count as one."""
    return _NO_ID.fullmatch(patient.strip()) is not None


def _in_elements(dataset: Dataset) -> Iterator[str]:
    for tag in list(dataset.keys()):
        if tag in PIXELS:  # may be large, and are looked at in _in_pixels
            continue
        if tag.is_private:
            yield PRIVATE
            continue
        element = dataset[tag]
        if element.is_empty:
            continue
        if (points := _points(element)) is not None:
            yield points
        if element.VR == "SQ":
            for item in element.value:
                yield from _in_elements(item)


def _points(element: DataElement) -> str | None:
    """The keyword of an element that may point at a person. What kind it is, the standard says and not the file."""
    from pydicom.datadict import dictionary_VR, keyword_for_tag

    keyword = keyword_for_tag(element.tag)  # of a repeating group too, where an element's own is empty
    if element.tag.group & 0xFF00 in DRAWN:
        return keyword or PRIVATE
    if element.tag.element == 0 and element.VR == "UL":  # the length of a group
        return None
    if not keyword:
        return PRIVATE
    kinds = dictionary_VR(element.tag)
    pointing = keyword in IDENTIFIERS or element.VR not in kinds or (kinds == "PN" and not _says_nobody(element))
    return keyword if pointing else None


def _says_nobody(element: DataElement) -> bool:
    names = element.value if element.VM > 1 else [element.value]
    return all(_NO_NAME.fullmatch(str(name).strip()) for name in names)


def _in_pixels(dataset: Dataset) -> Iterator[str]:
    said = str(dataset.get(BURNED_IN) or "").strip().upper()
    likely = dataset.get("Modality") in TEXT_MODALITIES or str(dataset.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE)
    if said == "YES" or (likely and said != "NO"):
        yield BURNED_IN
    if str(dataset.get(FACES) or "").strip().upper() == "YES":
        yield FACES
