variable "name" {
  description = "Name of the cluster and of what belongs to it."
  type        = string
  default     = "farspan"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,30}[a-z0-9]$", var.name))
    error_message = "name must be 2 to 32 of a-z, 0-9 and -, from a letter on."
  }
}

variable "region" {
  description = "AWS region."
  type        = string
  default     = "us-east-1"
}

variable "zones" {
  description = "Two zones or more: EKS asks for them. GPU nodes all run in the first one, on one network."
  type        = list(string)
  default     = ["us-east-1a", "us-east-1b"]

  validation {
    condition     = length(var.zones) >= 2 && length(distinct(var.zones)) == length(var.zones)
    error_message = "zones must name two different zones or more."
  }
}

variable "cidr" {
  description = "Addresses of the network; each zone gets two sixteenths of it."
  type        = string
  default     = "10.64.0.0/16"

  validation {
    condition     = can(cidrhost(var.cidr, 0)) && tonumber(split("/", var.cidr)[1]) <= 20
    error_message = "cidr must be an IPv4 network of /20 or larger."
  }
}

variable "kubernetes_version" {
  description = "Version of EKS."
  type        = string
  default     = "1.33"
}

variable "public_access_cidrs" {
  description = "Who may reach the API server from outside; empty: it has no public address."
  type        = list(string)
  default     = []

  validation {
    condition     = !contains(var.public_access_cidrs, "0.0.0.0/0")
    error_message = "public_access_cidrs must not be the whole internet."
  }
}

variable "namespace" {
  description = "Kubernetes namespace of farspan; its account `farspan` may use the bucket."
  type        = string
  default     = "farspan"
}

variable "launcher_clusters" {
  description = "Values of `name` in the specs of Ray's launcher: the head may name and end machines of these clusters alone. null: the one called `name`."
  type        = list(string)
  default     = null

  validation {
    condition     = var.launcher_clusters == null ? true : length(var.launcher_clusters) > 0
    error_message = "launcher_clusters must name a cluster, or be null."
  }
}

variable "node_groups" {
  description = "Kinds of nodes; all start at zero but `system`, which holds the operators."
  type = map(object({
    instance_type = string
    max           = number
    min           = optional(number, 0)
    gpus          = optional(number, 0)
    disk_gib      = optional(number, 200)
    spot          = optional(bool, false)
  }))
  default = {
    system  = { instance_type = "m7i.large", max = 3, min = 2 }
    head    = { instance_type = "m7i.2xlarge", max = 4 }
    cpu     = { instance_type = "m7i.4xlarge", max = 4 }
    train   = { instance_type = "p5.48xlarge", max = 1, gpus = 8, disk_gib = 500 }
    prefill = { instance_type = "p5.4xlarge", max = 4, gpus = 1, disk_gib = 500 }
    decode  = { instance_type = "p5.4xlarge", max = 4, gpus = 1, disk_gib = 500 }
  }

  validation {
    condition     = alltrue([for group in var.node_groups : group.gpus == 0 || group.min == 0])
    error_message = "a GPU group must start at zero: min must be 0."
  }
  validation {
    condition     = alltrue([for group in var.node_groups : group.min <= group.max && group.max >= 1])
    error_message = "max must be at least 1 and not below min."
  }
}
