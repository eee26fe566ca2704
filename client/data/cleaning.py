"""DICOM headers without a person: what is not on a short list of harmless attributes is gone.

This is stricter than the Basic Application Level Confidentiality Profile of DICOM PS3.15, Annex E, which lists what must go: an
attribute that the next edition invents, or a vendor, is gone here too. No attribute on the list is text that a person types,
and a code stays only if it is one of those that the standard defines. Of uncompressed pixels only the picture stays; what a
compressed stream holds besides cannot be told, and is refused until somebody answers for it.
"""

from __future__ import annotations

import hashlib
import hmac
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from wardround.client.data.dicom import read_dicom
from wardround.client.data.dicom_pixels import has_picture, only_picture
from wardround.client.data.identifiers import BURNED_IN, FACES, identifiers, is_placeholder, quietly
from wardround.common.errors import DataRefused

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

_ATTRIBUTES = """
    SOPClassUID Modality ImageType ConversionType SeriesNumber AcquisitionNumber InstanceNumber
    BodyPartExamined ViewPosition Laterality ImageLaterality PatientPosition PatientOrientation
    KVP ExposureTime XRayTubeCurrent Exposure MagneticFieldStrength RepetitionTime EchoTime InversionTime FlipAngle
    ScanningSequence SequenceVariant ScanOptions MRAcquisitionType
    SliceThickness SpacingBetweenSlices SliceLocation ImagePositionPatient ImageOrientationPatient PixelSpacing
    ImagerPixelSpacing NominalScannedPixelSpacing EstimatedRadiographicMagnificationFactor PixelAspectRatio
    SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit
    PixelRepresentation SmallestImagePixelValue LargestImagePixelValue PixelPaddingValue PixelPaddingRangeLimit
    PixelIntensityRelationship PixelIntensityRelationshipSign RescaleIntercept RescaleSlope WindowCenter WindowWidth
    VOILUTFunction PresentationLUTShape ModalityLUTSequence VOILUTSequence LUTDescriptor LUTData
    RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor
    RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
    LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence PixelMeasuresSequence PlanePositionSequence
    PlaneOrientationSequence PixelValueTransformationSequence FrameVOILUTSequence
    PixelData FloatPixelData DoubleFloatPixelData
"""
KEPT = frozenset(_ATTRIBUTES.split())
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
# what the standard wants in every picture, though it may be empty
EMPTIED = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID")
METHOD = "wardround: PS3.15 Basic Profile, only listed attributes kept"
_STATED = """
    PatientID PatientName BurnedInAnnotation RecognizableVisualFeatures PatientIdentityRemoved DeidentificationMethod
    DeidentificationMethodCodeSequence CodeValue CodingSchemeDesignator CodeMeaning LongitudinalTemporalInformationModified
"""
_TABLES = frozenset(keyword for keyword in KEPT if keyword.endswith(("LUTData", "TableData")))
_ADDED = frozenset([*_STATED.split(), *UIDS, *EMPTIED])
_PICTURES = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_BIG_ENDIAN = "1.2.840.10008.1.2.2"

# the codes that PS3.3 and PS3.16 define: any other may be a name in capitals
_CODES = {
    "Modality": "AR ASMT AU BDUS BI BMD CFM CR CT CTPROTOCOL DMS DG DOC DX ECG EEG EMG EOG EPS ES FID GM HC HD IO IOL IVOCT "
    "IVUS KER KO LEN LS MG MR M3D NM OAM OCT OP OPM OPR OPT OPTBSV OPTENF OPV OSS OT PA PLAN POS PR PT PX REG RESP RF RG "
    "RTDOSE RTIMAGE RTPLAN RTRECORD RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XC XAPROTOCOL",
    "ImageType": "ORIGINAL DERIVED MIXED PRIMARY SECONDARY",
    "ConversionType": "DV DI DF WSD SD SI DRW SYN",
    "BodyPartExamined": "ABDOMEN ABDOMENPELVIS ANKLE AORTA ARM AXILLA BACK BLADDER BRAIN BREAST BRONCHUS BUTTOCK CALCANEUS "
    "CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CLAVICLE COCCYX COLON CORNEA CORONARYARTERY "
    "CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FINGER FOOT FOREARM GALLBLADDER HAND HEAD "
    "HEADNECK HEART HIP HUMERUS ILEUM ILIUM IAC JAW JEJUNUM KIDNEY KNEE LARYNX LEG LIVER LSPINE LSSPINE LUNG MANDIBLE MAXILLA "
    "MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NOSE ORBIT OVARY PANCREAS PARATHYROID PAROTID PATELLA "
    "PELVIS PENIS PHARYNX PROSTATE RADIUS RECTUM RIB SACRUM SCALP SCAPULA SCLERA SCROTUM SHOULDER SI SINUS SKULL SPINE SPLEEN "
    "SSPINE STERNUM STOMACH TESTIS THIGH THUMB THYMUS THYROID TIBIA TLSPINE TMJ TOE TONGUE TRACHEA TSPINE ULNA URETER URETHRA "
    "UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA",
    "ViewPosition": "AP PA LL RL RLD LLD RLO LLO LAO RAO ML MLO CC LM LMO XCC XCCL XCCM FB SIO ISO CV RM RCC CCFS LATERAL",
    "Laterality": "R L U B",
    "ImageLaterality": "R L U B",
    "PatientPosition": "HFP HFS HFDR HFDL FFDR FFDL FFP FFS LFP LFS RFP RFS AFDR AFDL PFDR PFDL AFP AFS PFP PFS",
    "PatientOrientation": "A P R L H F AL AR AH AF PL PR PH PF RA RP RH RF LA LP LH LF HA HP HR HL FA FP FR FL",
    "ScanningSequence": "SE IR GR EP RM",
    "SequenceVariant": "SK MTC SS TRSS SP MP OSP NONE",
    "ScanOptions": "PER RG CG PPG FC PFF PFP SP FS CT",
    "MRAcquisitionType": "2D 3D",
    "PhotometricInterpretation": "MONOCHROME1 MONOCHROME2 RGB YBR_FULL YBR_FULL_422 YBR_PARTIAL_420 YBR_PARTIAL_422 YBR_ICT "
    "YBR_RCT XYB PALETTE_COLOR",
    "PixelIntensityRelationship": "LIN LOG DISP OTHER",
    "VOILUTFunction": "LINEAR LINEAR_EXACT SIGMOID",
    "PresentationLUTShape": "IDENTITY INVERSE",
    "LossyImageCompression": "00 01",
    "LossyImageCompressionMethod": "ISO_10918_1 ISO_14495_1 ISO_15444_1 ISO_15444_15 ISO_13818_2 ISO_14496_10 ISO_23008_2 "
    "ISO_18181_1",
}
CODES = {keyword: frozenset(codes.split()) for keyword, codes in _CODES.items()}


def pseudonym(key: bytes, patient: str) -> str:
    """P and 20 hexadecimal digits: the same for the same patient and key, and nobody's without the key (HMAC-SHA256)."""
    return "P" + hmac.digest(key, b"patient/" + patient.encode(), hashlib.sha256).hex()[:20].upper()


def other_uid(key: bytes, uid: str) -> str:
    """The UID that takes another's place: the same for the same UID and key (PS3.5 B.2)."""
    digest = hmac.digest(key, b"uid/" + uid.encode(), hashlib.sha256)
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=4).int}"


def clean(dataset: Dataset, key: bytes, *, pixels_seen: bool) -> Dataset:
    """A copy of what is harmless, under pseudonyms; `pixels_seen` says that somebody looked for text and faces in the pixels.

    Raises:
        DataRefused: no pixels, no patient, or the pixels may hold what points at somebody and nobody has looked.
        ValueError: the pixels, or a table of theirs, are not what the header says.
    """
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset

    patient = str(dataset.get("PatientID") or "").strip()
    if not has_picture(dataset):
        raise DataRefused("a file holds no picture")
    if is_placeholder(patient):
        raise DataRefused("a record has no patient", detail="PatientID is empty or a placeholder")
    if not pixels_seen and (shown := [name for name in identifiers(dataset) if name in (BURNED_IN, FACES)]):
        raise DataRefused("pixels may hold a name or a face", detail=f"{', '.join(shown)}: look at them, then --pixels-seen")
    cleaned = _kept(dataset)
    _add_pixels(cleaned, dataset, pixels_seen=pixels_seen)
    for keyword in UIDS:
        if uid := str(dataset.get(keyword) or ""):
            setattr(cleaned, keyword, other_uid(key, uid))
    for keyword in EMPTIED:
        setattr(cleaned, keyword, "")
    cleaned.PatientID = cleaned.PatientName = pseudonym(key, patient)
    for keyword in (BURNED_IN, FACES):
        if pixels_seen or dataset.get(keyword) == "NO":
            setattr(cleaned, keyword, "NO")
    method = Dataset()  # PS3.16 CID 7050
    method.CodeValue, method.CodingSchemeDesignator = "113100", "DCM"
    method.CodeMeaning = "Basic Application Confidentiality Profile"
    cleaned.PatientIdentityRemoved, cleaned.LongitudinalTemporalInformationModified = "YES", "REMOVED"
    cleaned.DeidentificationMethod, cleaned.DeidentificationMethodCodeSequence = METHOD, [method]
    cleaned.file_meta = FileMetaDataset()
    cleaned.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    cleaned.file_meta.MediaStorageSOPClassUID = cleaned.SOPClassUID
    cleaned.file_meta.MediaStorageSOPInstanceUID = cleaned.SOPInstanceUID
    return cleaned


def write_clean(cleaned: Dataset, path: Path) -> None:
    """Write a cleaned copy, read it back, and only then give it its name.

    Raises:
        DataRefused: what was written is not what may be there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with quietly():
            cleaned.save_as(part, enforce_file_format=True)
            written = read_dicom(part)
            wrong = [*identifiers(written), *sorted(_keywords(written) - KEPT - _ADDED)]
        if wrong:
            raise DataRefused("a cleaned copy still holds what may not be there", detail=", ".join(wrong))
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _kept(dataset: Dataset) -> Dataset:
    from pydicom import DataElement, Dataset, Sequence

    cleaned = Dataset()
    for tag in list(dataset.keys()):
        element = None if tag.is_private else dataset[tag]
        if element is None or element.keyword not in KEPT or element.keyword in _PICTURES or not _harmless(element):
            continue
        value = Sequence([_kept(item) for item in element.value]) if element.VR == "SQ" else element.value
        if element.keyword == "ImageType":
            value = _values(element)
        if element.keyword in _TABLES:
            _check_table(dataset, element)
        cleaned.add(DataElement(tag, element.VR, value))
    return cleaned


def _harmless(element: DataElement) -> bool:
    """Whether it is of the kind that the standard says, and a code is a code: a name could be hidden in either."""
    from pydicom.datadict import dictionary_VR

    if element.VR not in dictionary_VR(element.tag):  # "US or SS", where the pixels decide
        return False
    codes = CODES.get(element.keyword, frozenset())
    return element.VR != "CS" or all(not value or value.replace(" ", "_") in codes for value in _values(element))


def _values(element: DataElement) -> list[str]:
    values = list(element.value) if element.VM > 1 else [element.value]
    return values[:2] if element.keyword == "ImageType" else values  # what follows is the vendor's


def _add_pixels(cleaned: Dataset, dataset: Dataset, *, pixels_seen: bool) -> None:
    from pydicom import DataElement

    found = [dataset[keyword] for keyword in _PICTURES if keyword in dataset]
    if len(found) != 1 or not _harmless(found[0]):
        raise ValueError("pixels of several kinds, or of none")
    (element,), syntax = found, dataset.file_meta.TransferSyntaxUID
    if syntax == _BIG_ENDIAN:
        raise DataRefused("pixels cannot be checked", detail="big endian: convert it to explicit little endian first")
    if syntax.is_encapsulated and not pixels_seen:
        detail = "compressed, so that text besides the picture cannot be told: decompress it first, or --pixels-seen"
        raise DataRefused("pixels cannot be checked", detail=detail)
    value = element.value if syntax.is_encapsulated else only_picture(dataset, element.keyword)
    cleaned.add(DataElement(element.tag, element.VR, value))


def _check_table(dataset: Dataset, element: DataElement) -> None:
    """Refuse a lookup table of another length than its descriptor says (PS3.3 C.11.1.1); raises `ValueError`."""
    entries, _, bits = dataset[element.keyword.replace("Data", "Descriptor")].value
    entries = int(entries) or 1 << 16
    size = len(element.value) if isinstance(element.value, bytes) else 2 * element.VM
    if size != 2 * entries and not (bits == 8 and size == entries + entries % 2):
        raise ValueError("a lookup table of another length than it says")


def _keywords(dataset: Dataset) -> set[str]:
    return {element.keyword or str(element.tag) for element in dataset.iterall()}
