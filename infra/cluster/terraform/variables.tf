# Values come from terraform.tfvars.json, which `starflow cluster render` writes from the settings file.

variable "name" {
  type        = string
  description = "Prefix of everything that is created."
}

variable "account" {
  type        = string
  description = "AWS account; no other is touched."
}

variable "region" {
  type        = string
  description = "AWS region."
}

variable "zones" {
  type        = list(string)
  description = "Availability zones."
}

variable "bucket" {
  type        = string
  description = "S3 bucket of the store."
}

variable "prefix" {
  type        = string
  description = "Prefix of the store in the bucket; empty for all of it."
}

variable "namespace" {
  type        = string
  description = "Kubernetes namespace whose service accounts may use the bucket."
}

variable "service_accounts" {
  type        = list(string)
  description = "Those service accounts."
}

variable "kubernetes_version" {
  type        = string
  description = "Version of the control plane."
}

variable "api_networks" {
  type        = list(string)
  description = "Networks that may reach the Kubernetes API, and Ray machines over SSH."
}

variable "retention_days" {
  type        = number
  description = "How long deleted and replaced objects can be brought back."
}

variable "groups" {
  description = "Node groups by name."
  type = map(object({
    instance = string
    minimum  = number
    maximum  = number
    gpus     = number
    disk_gib = number
    spot     = bool
  }))
}
