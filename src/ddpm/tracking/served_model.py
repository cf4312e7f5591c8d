"""The model that MLflow serves for a version in the registry.

MLflow runs this file wherever it loads the version ("models from code"), with the copy of this library that was registered.
"""

from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from ddpm.errors import UserError
from ddpm.params import SampleParams
from ddpm.runtime.device import select_device
from ddpm.sampling.pipeline import Pipeline
from ddpm.serving.requests import Request, encoded, respond


class ImageGenerator(PythonModel):
    """Answers each request with images: PNG in base64, and the class of each."""

    def load_context(self, context: PythonModelContext) -> None:
        self.pipeline = Pipeline(Path(context.artifacts["checkpoint"]), select_device("auto"))
        self.sampling = SampleParams.model_validate(context.model_config)

    def predict(self, model_input: list[Request]) -> list[list[dict[str, str]]]:  # type: ignore[override]  # MLflow allows it
        try:
            return [encoded(*respond(self.pipeline, self.sampling, request)) for request in model_input]
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


set_model(ImageGenerator())
