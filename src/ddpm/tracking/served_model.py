"""The pipeline as a model of MLflow's registry: run by MLflow where the model is loaded (models from code)."""

from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from ddpm.errors import UserError
from ddpm.params import SampleParams
from ddpm.runtime.device import select_device
from ddpm.sampling.pipeline import Pipeline
from ddpm.serving.requests import Request, encoded, respond


class GarmentGenerator(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        self.pipeline = Pipeline(Path(context.artifacts["checkpoint"]), select_device("auto"))
        self.sampling = SampleParams.model_validate(context.model_config)

    def predict(self, model_input: list[Request]) -> list[list[dict[str, str]]]:
        try:
            return [encoded(*respond(self.pipeline, self.sampling, request)) for request in model_input]
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


set_model(GarmentGenerator())
